"""What helps to test consumers without a broker and without waiting; our own tests use it."""
