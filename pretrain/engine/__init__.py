# SPDX-License-Identifier: Apache-2.0
"""Training engine of both packages: configuration, loop, checkpoints, optimisers, distribution, logs."""
