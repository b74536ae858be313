// A prepared picture in, its label out: ONNX Runtime from Go, through cgo.
//
// The first line on stdout is the label, the second the logits. With REPEATS > 0 the third has the
// time of each further run in milliseconds, from the tensor to the label.
package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	ort "github.com/yalue/onnxruntime_go"
)

const (
	usage      = "usage: ort MODEL.onnx TENSOR.f32 LABELS.txt REPEATS LIBONNXRUNTIME"
	maxRepeats = 1_000_000
	maxValues  = 1 << 28
)

func main() {
	if len(os.Args) != 6 {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	repeats, err := strconv.ParseUint(os.Args[4], 10, 32)
	if err != nil || repeats > maxRepeats {
		fmt.Fprintf(os.Stderr, "%s\n(REPEATS is a whole number, at most %d)\n", usage, maxRepeats)
		os.Exit(2)
	}
	ort.SetSharedLibraryPath(os.Args[5])
	if err := answer(os.Args[1], os.Args[2], os.Args[3], int(repeats)); err != nil {
		fmt.Fprintln(os.Stderr, "ort:", err)
		os.Exit(1)
	}
}

func answer(model, tensor, labels string, repeats int) (err error) {
	if err := ort.InitializeEnvironment(ort.WithLogLevelFatal()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ort.DestroyEnvironment()) }()
	inputs, outputs, err := ort.GetInputOutputInfo(model)
	if err != nil {
		return err
	}
	if len(inputs) != 1 || inputs[0].DataType != ort.TensorElementDataTypeFloat {
		return errors.New("the model needs one input, float32")
	}
	values, err := floats(tensor, inputs[0].Dimensions)
	if err != nil {
		return err
	}
	input, err := ort.NewTensor(closed(inputs[0].Dimensions), values)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, input.Destroy()) }()
	output, err := ort.NewEmptyTensor[float32](closed(outputs[0].Dimensions))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, output.Destroy()) }()
	session, err := newSession(model, inputs[0].Name, outputs[0].Name, input, output)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Destroy()) }()

	if err := session.Run(); err != nil {
		return err
	}
	logits := output.GetData()
	text, err := os.ReadFile(labels)
	if err != nil {
		return err
	}
	names := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(names) != len(logits) {
		return fmt.Errorf("%d labels for %d logits", len(names), len(logits))
	}
	out := bufio.NewWriter(os.Stdout)
	fmt.Fprintln(out, names[largest(logits)])
	if err := out.Flush(); err != nil {
		return err
	}
	for _, logit := range logits {
		fmt.Fprint(out, logit, " ")
	}
	fmt.Fprintln(out)

	times := make([]float64, repeats)
	best := 0
	for k := range times {
		start := time.Now()
		if err := session.Run(); err != nil {
			return err
		}
		best = largest(output.GetData())
		times[k] = time.Since(start).Seconds() * 1e3
	}
	for _, taken := range times {
		fmt.Fprint(out, taken, " ")
	}
	if repeats > 0 {
		fmt.Fprintln(out)
		if names[best] != names[largest(logits)] {
			return errors.New("the label changed from run to run")
		}
	}
	return out.Flush()
}

// What edgelab.wasinn.backends.onnx.session_options gives every row, with one thread.
func newSession(model, in, out string, input, output ort.Value) (*ort.AdvancedSession, error) {
	options, err := ort.NewSessionOptions()
	if err != nil {
		return nil, err
	}
	defer func() { _ = options.Destroy() }() // the session has its own copy
	for _, err := range []error{
		options.SetIntraOpNumThreads(1),
		options.SetInterOpNumThreads(1),
		options.AddSessionConfigEntry("session.intra_op.allow_spinning", "0"),
		options.AddSessionConfigEntry("session.load_model_format", "ONNX"),
	} {
		if err != nil {
			return nil, err
		}
	}
	return ort.NewAdvancedSession(
		model, []string{in}, []string{out}, []ort.Value{input}, []ort.Value{output}, options)
}

// Sides that a model leaves open, such as the batch, become 1.
func closed(shape ort.Shape) ort.Shape {
	result := make(ort.Shape, len(shape))
	for k, side := range shape {
		result[k] = max(side, 1)
	}
	return result
}

// Little-endian float32, exactly as many as the shape has.
func floats(path string, shape ort.Shape) ([]float32, error) {
	count := int64(1)
	for _, side := range closed(shape) {
		if side > maxValues/count {
			return nil, errors.New("the model's input is too large")
		}
		count *= side
	}
	bytes, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if int64(len(bytes)) != 4*count {
		return nil, fmt.Errorf("%s: %d bytes; the model takes float32 %v", path, len(bytes), shape)
	}
	values := make([]float32, count)
	for k := range values {
		values[k] = math.Float32frombits(binary.LittleEndian.Uint32(bytes[4*k:]))
	}
	return values, nil
}

func largest(values []float32) int {
	best := 0
	for k, value := range values {
		if value > values[best] {
			best = k
		}
	}
	return best
}
