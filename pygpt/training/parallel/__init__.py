"""One training step on several ranks, with bits that do not depend on their number.

A rank is a process with a whole model and its own workers. A step has S parts, groups of micro-batches whose gradients are
summed from zero. A fixed binary tree over the parts' numbers adds them: the left half of [a, b) has the largest power of two of
parts below b - a. MPI only moves data, because the order of a library's own reductions depends on the number of ranks.

The ranks share the optimizer as in ZeRO-1 (Rajbhandari et al. 2020): each rank owns a slice of whole norm blocks. It receives
the sums of all ranks for its slice, adds them by the tree, and updates its weights and moments. Then it sends the weights to
all. One rank is the same program without messages. Refuses to know about data, files and options.
"""

import os

from ...errors import InputError
from .ranks import TIMEOUT_S, Ranks


def open_ranks(timeout: float = TIMEOUT_S) -> Ranks:
    """Return the ranks that mpiexec or srun started; without them, this process alone. Use them in a `with` block.

    timeout: seconds without a message from another rank, after which a rank ends with status 75. Raises InputError if
    there are several, but mpi4py is missing."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *(["SLURM_STEP_NUM_TASKS"] if "PMIX_RANK" in os.environ else []))
    if all(os.environ.get(name, "1") == "1" for name in names):
        return Ranks()
    try:
        from .mpi import MPIRanks
    except (ImportError, RuntimeError) as error:  # mpi4py, or the MPI library that it loads
        raise InputError(f"several ranks were started, but MPI is missing ({error}): pip install 'pygpt[mpi]' mpich") from None
    return MPIRanks(timeout)
