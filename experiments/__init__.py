"""Studies, one question per program, each with its recorded answer; pipeline; launch."""
