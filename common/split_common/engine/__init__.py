"""The engine: runs a contiguous range of layers over packed tokens of many sequences, with a shared KV pool.

`pool` holds keys and values in pages, `attention` reads and writes them, `runner` packs sequences into one forward
of transformers' own layers, and `scheduler` decides which tokens go into the next one.
"""
