# SPDX-License-Identifier: Apache-2.0
"""Sample sources: Sticker Scenes, image-caption pairs, image folders."""
