# SPDX-License-Identifier: Apache-2.0
"""Offline proposals, their crops, and the store of their embeddings."""
