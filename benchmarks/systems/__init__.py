"""Programs that let other systems generate. They run in an environment of their own: `make bench-peers`.

They import neither lambda-split nor each other, but for `stream`.
"""
