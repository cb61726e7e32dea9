"""The paper's experiments: data, runs that survive being killed, grids, pictures and tables.

`bench/experiment.py` is the command line. A run is a `Settings`; what it leaves is a `records` file; pictures and
tables are made of those files alone.
"""
