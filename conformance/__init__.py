"""The judge: decides whether an implementation of an operator, in any language, agrees with the specification.

budget.py says how far a right implementation may be; case.py what is judged; vectors.py keeps the frozen corpus;
law.py runs properties on any implementation; mutant.py proves that the suite can fail; verdict.py decides.
One file per operator family stands in conformance/ops, under the same name as in refimpl/ops; one per model in
conformance/models, which model.py judges.
"""
