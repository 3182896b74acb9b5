"""What reaches a broker. Nothing imports an adapter: the scheme of a URL finds it."""
