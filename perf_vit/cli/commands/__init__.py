"""Words and options of the command line; what they do stands beside this folder."""
