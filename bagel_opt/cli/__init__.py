"""The command line: `bagel-opt`, or `python -m bagel_opt`. `main` in commands.py runs it."""
