"""The engine: runs a contiguous range of layers over packed tokens of many sequences, with a shared KV pool.

`scheduler` decides which tokens go into the next forward, and `runner` runs transformers' own layers over them:
`packed`, if `probe` has found that to be right, else `per_sequence`. `pool` holds keys and values in pages, which
`attention` reads and writes through a backend, `sdpa` or `flash`.
"""
