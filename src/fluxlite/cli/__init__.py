"""What stands between a user or a disk and the code: options, descriptions, command lines,
programs. It knows no program.
"""
