"""What runs a consumer: lifecycle, workers, sessions, handlers, settlement."""
