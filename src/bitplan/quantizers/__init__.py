"""Rounding methods: which numbers of a format stand for a weight matrix. One file each.

A format says what can be stored, a method which of the possible numbers are. Arrays in, arrays out:
nothing here knows of models. `rtn` takes the nearest number; `gptq` and `spqr` choose so that the
outputs of the layer change least, `awq` and `smoothquant` scale columns first, in ways that leave
the model's function as it is.
"""
