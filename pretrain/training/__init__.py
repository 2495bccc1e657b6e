# SPDX-License-Identifier: Apache-2.0
"""What `pretrain.train` sets up: task, samples and optimiser of each kind of method."""
