# SPDX-License-Identifier: Apache-2.0
"""How good are frozen features? kNN, linear and few-label classifiers (`python -m pretrain.probe`)."""
