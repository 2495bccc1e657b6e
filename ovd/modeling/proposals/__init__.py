# SPDX-License-Identifier: Apache-2.0
"""Class-agnostic proposals of photographs, from a small one-stage detector."""
