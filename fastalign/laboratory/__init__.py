"""A laboratory: sources of strings whose optimum is known, and every method of the trainer on them.

source.py    the sources, and each of them as a transformer
targets.py   where each method ends, exactly
methods.py   how each method is trained, by the trainer's own code
exact.py     what the trained policy is, string by string
command.py   `fastalign laboratory`: all of it; picture.py draws what came out
"""
