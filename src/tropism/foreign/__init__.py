"""Files that others wrote, made safe to read: model folders, weight files, GGUF files and chat templates.

Nothing here trusts a name, a size or a number that stands in a file. What passes is handed to the libraries that read
it; what does not is refused with an error that names the file.
"""
