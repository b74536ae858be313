;; What stands between a component and the host, so that bytes cross at the speed of a copy.
;;
;; wasmtime hands a list<u8> over as one value of 32 bytes for each byte, through its C API. Even with
;; NumPy (`values.py`) that takes tens of milliseconds for the tensor of an image, and there can be no
;; more than some 3 MB at a time. A string crosses as a whole. In the encoding latin1 each byte is one
;; character, whatever it is: so here, a list<u8> becomes a string without being touched. Only `lift`
;; and `lower` disagree about what it is.
;;
;; Between two components, wasmtime copies lists in machine code. The guest is therefore a component
;; of its own beside the two adapters, whose memories only hold what is under way. That copy also
;; aligns the data, which latin1 asks for and a guest's own bytes need not be.
;;
;; The imports are what `component.py` provides. The types are those of wasi:nn; a guest whose
;; imports differ from them does not even validate.
(component
  (import "errors" (instance $errors
    (type $code' (enum "invalid-argument" "invalid-encoding" "timeout" "runtime-error"
      "unsupported-operation" "too-large" "not-found" "security" "unknown"))
    (export "error-code" (type $code (eq $code')))
    (export "error" (type $error (sub resource)))
    (export "[method]error.code" (func (param "self" (borrow $error)) (result $code)))
    (export "[method]error.data" (func (param "self" (borrow $error)) (result string)))))
  (alias export $errors "error" (type $error))

  (type $tensor-host (instance
    (type $ty' (enum "FP16" "FP32" "FP64" "BF16" "U8" "I32" "I64"))
    (export "tensor-type" (type $ty (eq $ty')))
    (export "tensor" (type $tensor (sub resource)))
    (export "[constructor]tensor" (func (param "dimensions" (list u32)) (param "ty" $ty)
      (param "data" string) (result (own $tensor))))
    (export "[method]tensor.dimensions" (func (param "self" (borrow $tensor)) (result (list u32))))
    (export "[method]tensor.ty" (func (param "self" (borrow $tensor)) (result $ty)))
    (export "[method]tensor.data" (func (param "self" (borrow $tensor)) (result string)))))
  (import "tensor" (instance $tensor-host (type $tensor-host)))
  (alias export $tensor-host "tensor" (type $tensor))

  (import "inference" (instance $inference
    (alias outer 1 $error (type $error'))
    (export "error" (type $error (eq $error')))
    (alias outer 1 $tensor (type $tensor'))
    (export "tensor" (type $tensor (eq $tensor')))
    (export "graph-execution-context" (type $context (sub resource)))
    (type $named' (tuple string (own $tensor)))
    (export "named-tensor" (type $named (eq $named')))
    (export "[method]graph-execution-context.compute" (func (param "self" (borrow $context))
      (param "inputs" (list $named)) (result (result (list $named) (error (own $error))))))))
  (alias export $inference "graph-execution-context" (type $context))

  (import "graph" (instance $graph-host
    (alias outer 1 $error (type $error))
    (alias outer 1 $context (type $context))
    (type $encoding' (enum "openvino" "onnx" "tensorflow" "pytorch" "tensorflowlite" "ggml"
      "autodetect"))
    (export "graph-encoding" (type $encoding (eq $encoding')))
    (type $target' (enum "cpu" "gpu" "tpu"))
    (export "execution-target" (type $target (eq $target')))
    (export "graph" (type $graph (sub resource)))
    (export "[method]graph.init-execution-context" (func (param "self" (borrow $graph))
      (result (result (own $context) (error (own $error))))))
    (export "load" (func (param "builder" (list string)) (param "encoding" $encoding)
      (param "target" $target) (result (result (own $graph) (error (own $error))))))
    (export "load-by-name" (func (param "name" string)
      (result (result (own $graph) (error (own $error))))))))

  ;; Memory for one call: what was allocated for it ends with it.
  (core module $heap
    (memory (export "memory") 1)
    (global $top (mut i32) (i32.const 16))
    (func (export "realloc")
      (param $old i32) (param $had i32) (param $align i32) (param $size i32) (result i32)
      (local $end i32) (local $missing i32)
      ;; A string of the host turned out shorter than its bytes; none ever gets longer.
      (if (local.get $old) (then
        (if (i32.gt_u (local.get $size) (local.get $had)) (then (unreachable)))
        (return (local.get $old))))
      (local.set $old (global.get $top))
      (local.set $end (i32.add (local.get $old) (local.get $size)))
      ;; From 2 GiB on, the length of a string in latin1 would mean something else.
      (if (i32.lt_s (i32.or (local.get $size) (local.get $end)) (i32.const 0))
        (then (unreachable)))
      (local.set $missing (i32.sub
        (i32.shr_u (i32.add (local.get $end) (i32.const 65535)) (i32.const 16))
        (memory.size)))
      ;; If it can't grow, wasmtime traps: it checks that what it gets lies in the memory.
      (if (i32.gt_s (local.get $missing) (i32.const 0))
        (then (drop (memory.grow (local.get $missing)))))
      (global.set $top
        (i32.and (i32.add (local.get $end) (i32.const 15)) (i32.const -16)))
      (local.get $old))
    (func (export "done") (param i32) (global.set $top (i32.const 16))))

  (component $tensor-adapter
    (import "host" (instance $host (type $tensor-host)))
    (alias export $host "tensor-type" (type $ty'))
    (alias export $host "tensor" (type $tensor'))
    (export $ty "tensor-type" (type $ty'))
    (export $tensor "tensor" (type $tensor'))
    (type $dimensions' (list u32))
    (export $dimensions "tensor-dimensions" (type $dimensions'))
    (type $bytes' (list u8))
    (export $bytes "tensor-data" (type $bytes'))

    (core instance $heap (instantiate $heap))
    (alias core export $heap "memory" (core memory $memory))
    (alias core export $heap "realloc" (core func $realloc))
    (alias core export $heap "done" (core func $done))

    (core func $new (canon lower (func $host "[constructor]tensor")
      (memory $memory) (realloc $realloc) string-encoding=latin1+utf16))
    (func $new' (param "dimensions" $dimensions) (param "ty" $ty) (param "data" $bytes)
      (result (own $tensor))
      (canon lift (core func $new) (memory $memory) (realloc $realloc) (post-return $done)))

    ;; A function that is called leaves its result where it was told to; one that is offered says
    ;; where it left it, and gives back what it borrowed.
    (core func $data (canon lower (func $host "[method]tensor.data")
      (memory $memory) (realloc $realloc) string-encoding=latin1+utf16))
    (core func $drop (canon resource.drop $tensor'))
    (core module $offer
      (import "heap" "realloc" (func $realloc (param i32 i32 i32 i32) (result i32)))
      (import "host" "data" (func $data (param i32 i32)))
      (import "host" "drop" (func $drop (param i32)))
      (func (export "data") (param $self i32) (result i32) (local $out i32)
        (local.set $out (call $realloc (i32.const 0) (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $data (local.get $self) (local.get $out))
        (call $drop (local.get $self))
        (local.get $out)))
    (core instance $offer (instantiate $offer
      (with "heap" (instance $heap))
      (with "host" (instance (export "data" (func $data)) (export "drop" (func $drop))))))
    (func $data' (param "self" (borrow $tensor)) (result $bytes)
      (canon lift (core func $offer "data") (memory $memory) (realloc $realloc)
        (post-return $done)))

    (export "[constructor]tensor" (func $new'))
    (export "[method]tensor.dimensions" (func $host "[method]tensor.dimensions")
      (func (param "self" (borrow $tensor)) (result $dimensions)))
    (export "[method]tensor.ty" (func $host "[method]tensor.ty")
      (func (param "self" (borrow $tensor)) (result $ty)))
    (export "[method]tensor.data" (func $data')))

  (component $graph-adapter
    (import "error" (type $error' (sub resource)))
    (import "context" (type $context' (sub resource)))
    (import "tensor" (type $tensor' (sub resource)))
    (import "graph" (type $graph' (sub resource)))
    (type $encoding'' (enum "openvino" "onnx" "tensorflow" "pytorch" "tensorflowlite" "ggml"
      "autodetect"))
    (import "encoding" (type $encoding' (eq $encoding'')))
    (type $target'' (enum "cpu" "gpu" "tpu"))
    (import "target" (type $target' (eq $target'')))
    (import "init-execution-context" (func $init (param "self" (borrow $graph'))
      (result (result (own $context') (error (own $error'))))))
    (import "load" (func $load (param "builder" (list string)) (param "encoding" $encoding')
      (param "target" $target') (result (result (own $graph') (error (own $error'))))))
    (import "load-by-name" (func $load-by-name (param "name" string)
      (result (result (own $graph') (error (own $error'))))))
    (export $error "error" (type $error'))
    (export $context "graph-execution-context" (type $context'))
    (export "tensor" (type $tensor'))
    (export $graph "graph" (type $graph'))
    (export $encoding "graph-encoding" (type $encoding'))
    (export $target "execution-target" (type $target'))
    (type $bytes' (list u8))
    (export $bytes "graph-builder" (type $bytes'))

    (core instance $heap (instantiate $heap))
    (alias core export $heap "memory" (core memory $memory))
    (alias core export $heap "realloc" (core func $realloc))
    (alias core export $heap "done" (core func $done))

    (core func $load-core (canon lower (func $load)
      (memory $memory) (realloc $realloc) string-encoding=latin1+utf16))
    (core module $offer
      (import "heap" "realloc" (func $realloc (param i32 i32 i32 i32) (result i32)))
      (import "host" "load" (func $load (param i32 i32 i32 i32 i32)))
      (func (export "load") (param i32 i32 i32 i32) (result i32) (local $out i32)
        (local.set $out (call $realloc (i32.const 0) (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $load
          (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get $out))
        (local.get $out)))
    (core instance $offer (instantiate $offer
      (with "heap" (instance $heap))
      (with "host" (instance (export "load" (func $load-core))))))
    (func $load' (param "builder" (list $bytes)) (param "encoding" $encoding)
      (param "target" $target) (result (result (own $graph) (error (own $error))))
      (canon lift (core func $offer "load") (memory $memory) (realloc $realloc)
        (post-return $done)))

    (export "[method]graph.init-execution-context" (func $init)
      (func (param "self" (borrow $graph))
        (result (result (own $context) (error (own $error))))))
    (export "load" (func $load'))
    (export "load-by-name" (func $load-by-name)
      (func (param "name" string) (result (result (own $graph) (error (own $error)))))))

  (component) ;; number 2: the guest takes its place

  (instance $tensor-guest (instantiate $tensor-adapter (with "host" (instance $tensor-host))))
  (instance $graph-guest (instantiate $graph-adapter
    (with "error" (type $error))
    (with "context" (type $context))
    (with "tensor" (type $tensor))
    (with "graph" (type $graph-host "graph"))
    (with "encoding" (type $graph-host "graph-encoding"))
    (with "target" (type $graph-host "execution-target"))
    (with "init-execution-context" (func $graph-host "[method]graph.init-execution-context"))
    (with "load" (func $graph-host "load"))
    (with "load-by-name" (func $graph-host "load-by-name"))))
  (instance $running (instantiate 2
    (with "wasi:nn/errors@0.2.0-rc-2024-10-28" (instance $errors))
    (with "wasi:nn/tensor@0.2.0-rc-2024-10-28" (instance $tensor-guest))
    (with "wasi:nn/inference@0.2.0-rc-2024-10-28" (instance $inference))
    (with "wasi:nn/graph@0.2.0-rc-2024-10-28" (instance $graph-guest))))
  ;; The guest's functions may use any type of wasi:nn: so each must have a name out there, too.
  (instance $types
    (export "tensor" (type $tensor-guest "tensor"))
    (export "tensor-type" (type $tensor-guest "tensor-type"))
    (export "graph" (type $graph-guest "graph"))
    (export "graph-encoding" (type $graph-guest "graph-encoding"))
    (export "execution-target" (type $graph-guest "execution-target")))
  (export "types" (instance $types))
  (export "guest" (instance $running)))
