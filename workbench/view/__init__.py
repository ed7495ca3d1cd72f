"""The viewer of `workbench view` and `--watch`: pages of a project on this machine, which change nothing.

Folder   what a project has, from sizes and times of files and small records
Guard    who is answered: this machine, with the address that the command printed
"""
