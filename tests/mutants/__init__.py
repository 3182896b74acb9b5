"""Would the tests notice? The table of mutants, and what runs it."""
