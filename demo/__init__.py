"""The demonstration: operators judged; two models trained, exported, served without torch, read by CAN and whitening.

The only folder that may import every other one; nothing imports it.
"""
