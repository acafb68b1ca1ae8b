"""Trials of commands that are killed, or get damaged or hostile files and values.

Every trial runs the command line on tiny models and is judged from outside: by exit status,
messages, time, memory and the files on the disk.
"""
