# SPDX-License-Identifier: Apache-2.0
"""Networks: image towers, text towers, the joint encoder."""
