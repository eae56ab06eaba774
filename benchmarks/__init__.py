"""Side-by-side runs of tropism and its peers on the same work, and the limits of the machine they run on.

``python -m benchmarks`` measures the standard works, ``python -m benchmarks scaling`` how the cost grows.
docs/performance.md says how it is measured.
"""
