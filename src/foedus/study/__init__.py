"""Studies: methods compared over seeds by what `measure.py` finds of each finished run."""
