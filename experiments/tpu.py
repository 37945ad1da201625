"""What the TPU compiler has to be told on a machine without a TPU."""

ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "XLA_FLAGS": ""}
"""Variables to be set before libtpu is loaded; with the last but one several processes may compile at once, and flags of other compilers would be refused."""

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest topology of each kind of chip, as JAX names them."""
