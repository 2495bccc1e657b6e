# SPDX-License-Identifier: Apache-2.0
"""The machine-learning backend of Label Studio: pre-annotations from the words of a labelling configuration."""
