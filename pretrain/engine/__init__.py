# SPDX-License-Identifier: Apache-2.0
"""What both packages train with: configuration, training loop, checkpoints, optimisers, distribution, logs."""
