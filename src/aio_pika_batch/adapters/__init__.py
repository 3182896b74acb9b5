"""What reaches a broker. Nothing outside imports an adapter: they are found by the scheme of a URL."""
