"""What a user asks for, planned and executed: values in, values out; nothing is printed.

`keywords` makes an `invocation` of a call, `settings` one of a command line; `preparation` makes a
run on disk of it, whose `summary` says what is left to do; `execution` does that, and counts its
`progress`. `planned_run` is what Python code sees of it all.
"""
