"""The method: arrays in, arrays out; knows no Ray, no storage, no MLflow and no faiss."""
