"""The jobs behind the commands: each takes plain settings and a reporter, and leaves files."""
