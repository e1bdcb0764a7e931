package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
)

const annotationPrefix = "at-least-semaphore-pod-hook.kaidotio.github.io/"

// newReview makes the AdmissionReview of a pod of shop/web with length 3 from a review
// that a real API server sent. whenFull is the pod's annotation; empty: none.
func newReview(pod, whenFull string) ([]byte, error) {
	body, err := os.ReadFile(reviewFile)
	if err != nil {
		return nil, fmt.Errorf("run this from the project's folder: %w", err)
	}
	var review struct {
		Kind       string         `json:"kind"`
		APIVersion string         `json:"apiVersion"`
		Request    map[string]any `json:"request"`
	}
	if err := json.Unmarshal(body, &review); err != nil {
		return nil, err
	}
	metadata := review.Request["object"].(map[string]any)["metadata"].(map[string]any)
	metadata["name"] = pod
	annotations := metadata["annotations"].(map[string]any)
	annotations[annotationPrefix+"key"] = "web"
	annotations[annotationPrefix+"length"] = "3"
	if whenFull != "" {
		annotations[annotationPrefix+"when-full"] = whenFull
	}
	return json.Marshal(review)
}

// answer is the part of the webhook's AdmissionReview that the API server uses.
type answer struct {
	Allowed  bool     `json:"allowed"`
	Patch    []byte   `json:"patch"`
	Warnings []string `json:"warnings"`
	Status   struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"status"`
}

// patchOperation is one step of a JSON patch. If its value is a list of containers, it
// has the sidecar's args.
type patchOperation struct {
	Op    string          `json:"op"`
	Path  string          `json:"path"`
	Value json.RawMessage `json:"value"`
}

// errUndecided means that the webhook could not decide in time.
var errUndecided = errors.New("no verdict")

// create sends the webhook what the API server sends when a pod is created.
func (s *setup) create(pod, whenFull string) (*answer, error) {
	body, err := newReview(pod, whenFull)
	if err != nil {
		return nil, err
	}
	response, err := s.client.Post(s.webhookURL, "application/json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode == http.StatusInternalServerError {
		return nil, fmt.Errorf("%w: %s", errUndecided, text)
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the webhook answered %s %s: %s", response.Proto, response.Status, text)
	}
	var review struct {
		Response answer `json:"response"`
	}
	return &review.Response, json.Unmarshal(text, &review)
}

// sidecarArgs finds the args of the sidecar, the first of the injected containers, in a
// patch.
func sidecarArgs(patch []patchOperation) ([]string, error) {
	for _, o := range patch {
		var list []struct {
			Name string   `json:"name"`
			Args []string `json:"args"`
		}
		if json.Unmarshal(o.Value, &list) == nil && len(list) == 2 {
			return list[0].Args, nil
		}
	}
	return nil, fmt.Errorf("no sidecar in the patch %s", patch)
}
