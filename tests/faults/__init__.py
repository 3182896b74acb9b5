"""Does a consumer under load survive what can happen to a broker and to the line to it?

One file for each kind of fault, with figures: ``docs/reliability.md`` tells them. The whole suite
takes minutes, so only the tests of ``test_operator.py`` run with all others.
"""
