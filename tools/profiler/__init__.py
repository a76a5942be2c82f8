"""What tools/profile.py is made of.

job         the job that is profiled, generation or training, and what the workers noted about it: calls, steps, events
work        how many operations and bytes each kernel needs at least
numbers     hotspots, layers, serial fraction and predictions: everything that follows from a job's events
strategies  thread counts, the serial reference and ways to dispatch, timed against each other
startup     a fresh process until its first token or iteration
text        the report as text, at most 100 columns wide
compare     two reports in JSON, and what moved between them
traces      Chrome's trace events and Paraver's three files
plots       pictures, with matplotlib
perf        the same job seen by Linux perf

What it takes from pygpt are its public names, and three inner ones: sampling.sample, the step from logits to a token,
model.MEETING_WEIGHT for --all-workers, and the names of the phases.
"""
