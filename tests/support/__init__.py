"""What the tests need that is not about the library: brokers to start and to hurt, a line to cut.

What finds and starts a broker is shipped, for users' tests, and imported from there; like that,
nothing here imports the library itself: what it says about a broker must not depend on the code
under test.
"""
