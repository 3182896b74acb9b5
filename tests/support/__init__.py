"""What the tests need beside the library: brokers and servers to start, and proxies to cut.

What finds and starts a broker is shipped for users' tests, and imported from there. Like that,
nothing here imports the library itself: what it says about a broker must not depend on the code
under test.
"""
