"""Training models: what `refimpl train` does, from files to a model folder.

job         a training as people ask for it, from one end to the other; command.py is its command line
loop        the loop: an optimiser under a schedule, evaluations on the way, taken up where it stopped
task        what is learnt: finetune and pretrain make one of files, multitask of several
text        from files to token ids; vocabulary finds the tokenizer
optim, schedule, start, memory, distributed        what a step needs
run, journal        what a run leaves behind: its state, tables, pictures and events
"""
