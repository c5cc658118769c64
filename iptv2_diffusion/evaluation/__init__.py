"""What eval/ and the recipes measure and draw by: metrics, references, folders of samples, peers, speed."""
