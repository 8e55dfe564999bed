"""Faults that strike a training run: `python -m benchmarks.faults`.

Claim: whatever point of a step or of a checkpoint a fault strikes, the run goes on as if nothing
had been. `README.md` beside this folder says what each fault is and when it counts as survived.
A small perceptron in float64 checkpoints after every step into a folder. Each fault strikes at one
point of its third step or of the checkpoint after it; the run then resumes from the folder, in a
new enclave and where the host was killed in a new process, and has to end in the state of an
uninterrupted run.
"""
