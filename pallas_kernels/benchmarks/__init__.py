"""Parts of `python -m pallas_kernels.benchmark`: cases, floors, timing, peers, report."""
