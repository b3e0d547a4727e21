"""What is decided about a file before a framework sees a byte of it. Nothing here imports torch.

Each module checks one kind of file as data and raises `LoadError` with file, place and reason.
`source.check` is the door for whatever the user names as a model.
"""
