"""Private names of other libraries, one module for each library: if an upgrade breaks one, it does so here.

Nothing outside this package uses a private name of another library. Every function says which version it was
written against and where to look when it breaks; `tests/common/test_compat.py` has a test for each. Importing the
package itself imports none of the libraries.
"""
