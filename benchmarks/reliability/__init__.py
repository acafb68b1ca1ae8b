"""What happens to a command that is killed, or given damaged or hostile files and values.

Every trial runs the command line on tiny models and is judged from outside: by exit status,
messages, time, memory and what is left on the disk.
"""
