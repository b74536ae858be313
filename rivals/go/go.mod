module edgelab/rivals

go 1.21

require github.com/yalue/onnxruntime_go v1.21.0
