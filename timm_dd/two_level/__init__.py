"""The second level: the K parts decide together, without a global network (CNN-DNN of klawonn2023)."""
