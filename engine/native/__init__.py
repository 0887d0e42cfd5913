"""Kernels of our own for the CPU, in C++, compiled for the processor at hand.

PyTorch has no kernel that attends over scattered blocks, or that adds, norms and rounds
a row in one pass; each is a handful of calls there, and a copy. What is here does a
layer's work between its matrix products (those stay oneDNN's), and for few rows a whole
step:

    kernels.cpp   the C interface
    stack.h       a whole step of a model of the Llama kind
    attention.h   attention over reads of a plan, scores in registers
    rows.h        norm, rotary embedding, gate
    tiles.h       products by the processor's matrix unit
    lanes.h       vectors as wide as the processor has them
    team.h        threads that share work
    library.py    compiles them once, with g++, into the user's cache directory
    kernels.py    calls them with tensors
    step.py       the attention of a step
    decoder.py    a whole step; panels.py: where its packed weights lie

Where there is no compiler, or a model in float16, everything runs on PyTorch's kernels
as before. `python -m engine.native` compiles ahead of time.
"""
