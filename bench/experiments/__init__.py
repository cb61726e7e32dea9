"""The paper's experiments: settings, data, runs, records, grids, pictures and tables; see `bench/experiment.py`."""
