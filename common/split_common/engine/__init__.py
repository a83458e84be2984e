"""The engine: runs a contiguous range of layers over packed tokens of many sequences, with a shared KV pool.

`scheduler` decides which tokens go into the next forward, and `runner` runs transformers' own layers over them,
with `packed` if `probe` has found its output to be right, else with `per_sequence`. `pool` holds keys and values in
pages, which `attention` reads and writes through a backend, `sdpa` or `flash`.
"""
